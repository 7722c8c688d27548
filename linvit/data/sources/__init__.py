"""Where images come from: folders, CSV lists, tars, Hugging Face sets, loose files."""
