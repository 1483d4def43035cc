"""Images: files to pixels, pixels to rows of the model's hidden states, and their place in a prompt."""
