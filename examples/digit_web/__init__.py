"""The page to draw a digit on: its server in three files, and in page/ what the browser gets."""
