"""The order of token ids in a bundle: frequent tokens first, where drafts come from the first rows alone."""
