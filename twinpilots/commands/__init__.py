"""One module per command of the terminal; see `twinpilots.cli` for the frame they share."""
