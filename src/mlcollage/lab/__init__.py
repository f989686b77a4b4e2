"""The lab turns a study into evidence: what is run, where it runs, where it is kept, how it is judged."""
