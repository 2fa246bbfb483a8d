"""The claims of the paper as pure functions over records, and planning under a budget."""
