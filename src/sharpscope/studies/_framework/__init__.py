"""What every study stands on: claims, jobs, runs, pages."""
