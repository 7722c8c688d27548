"""Where a model looks: heat maps of attention and of gradients, and whether they are true."""
