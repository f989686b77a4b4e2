"""The papers: one folder each, with the same rooms (method, study, slide)."""
