"""Other projects' conventions of linear attention, to ours and back."""
