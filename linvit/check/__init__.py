"""`linvit check`: what is wrong with a folder of images, and what training would do with it. Nothing is modified."""
