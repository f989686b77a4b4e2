"""Neural mechanics: symmetries of the loss, the laws they give, and how real training breaks them."""
