"""A linear classifier on the features of a pretrained model: `linvit probe`."""
