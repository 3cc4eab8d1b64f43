"""The HTTP endpoint: one thread drives the engine, the event loop speaks OpenAI's API, metrics and a page.

Needs the extra ``serve`` (FastAPI, uvicorn), which is imported when a server starts and not before.
"""
