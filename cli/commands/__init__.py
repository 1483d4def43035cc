"""One module per command: options, one call into the library, one rendering."""
