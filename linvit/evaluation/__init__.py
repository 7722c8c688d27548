"""What `linvit eval` does beyond running a model over images: classes by name, scores, their certainty, comparisons."""
