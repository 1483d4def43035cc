"""What commands print: text, tables and plots made of letters; and how Ctrl-C ends them."""
