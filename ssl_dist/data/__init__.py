"""From images on disk to batches of views: catalog, conversion, readers, plan, views, loader."""
