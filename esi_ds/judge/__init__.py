"""The judge: a frozen guard model whose verdict is differentiated with respect to the response's tokens."""
