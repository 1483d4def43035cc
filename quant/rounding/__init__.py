"""How weights become few bits: to nearest, by a search, by importance, by GPTQ, by learning."""
