"""What several backends share: precision, contexts, workspaces, the ends of a window."""
