"""Pages of what a run did (`report.html`, `linvit report`) and of how good a model is (`linvit eval --html`)."""
