"""Reading data: rows from files and hub data sets, prompts from rows, token ids from prompts."""
