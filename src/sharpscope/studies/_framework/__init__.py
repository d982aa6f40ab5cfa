"""The frame of every study: claims, jobs, runs on disk, and pages."""
