"""Charts as data, figures, pages: what a person looks at."""
