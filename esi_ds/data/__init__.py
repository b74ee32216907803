"""Reading data: rows of any usual file or hub set, prompts out of rows, ids out of prompts."""
