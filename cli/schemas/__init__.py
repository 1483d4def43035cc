"""What --json prints, by command: the definitions, and the JSON Schema files made from them."""
