"""Sources of images: folders, CSV lists, tars, Hugging Face sets, loose files."""
