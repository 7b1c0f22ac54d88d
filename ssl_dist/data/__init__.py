"""Converted data sets: what is known of them, their files and readers, the order of their images, the loader."""
