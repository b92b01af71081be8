"""Which files of a data set cannot be used, and how can the user correct them?

- scan: decodes every file once and caches size, hash, thumbnail and pixel counts
- near_duplicates: compares the thumbnails, to find reduced and re-encoded copies of an image
- checks: compares these facts with the classes and lists all errors and warnings
- report: a table of the sets, and a picture or HTML page with samples

The package may import modules of `data` and `utils`. `data.sources` and `data.listings` use `scan` and `checks`, so
only `report` imports `data.sources`.
"""
