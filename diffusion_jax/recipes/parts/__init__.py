"""What a study needs besides the packages and does not fit into its one file."""
