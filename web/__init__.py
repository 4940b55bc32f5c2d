"""bundle/ -> a page that runs it in a browser, on onnxruntime-web.

    import pastkey.web
    files = pastkey.web.site("bundle/")   # address relative to the page -> a file, or its content

- `site`: the files of the page, and the index of a browser's downloads. Nothing is copied.
- `command`: `pastkey web`, which writes these files to a folder.
- `page/`: the page, its worker and its service worker, and `pastkey.js`, which others can use without the page.
- `lib/`: onnxruntime-web, the tokenizer and Jinja, which `make web-assets` installs by `package-lock.json`.
"""

from .site import site as site
