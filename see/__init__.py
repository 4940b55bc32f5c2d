"""Shows the values inside a decoder, on one page that needs no network.

    bundle or source --open--> graph --inspectable.py--> graph with inner outputs --inspection.py--> numbers
    numbers --panels.py--> the page's data --inline.py--> page.html

`pastkey see` edits the bundle's all-logits graph in memory, so no bundle needs anything more for it. Every number of
the page comes from one run of that graph over the prompt and the output.
"""
