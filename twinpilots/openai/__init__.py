"""OpenAI's completion and chat-completion bodies: JSON objects in, sampling parameters and prompts out, and finished outputs as JSON objects again."""
