"""Text of the handbook's pages, as a real model is measured on it."""

from measured_texts import page_text

PAGE = """<html><head><title>No title</title></head><body><p id="title"><img src="a.png" alt="logo"/>Site</p>
<ul class="docnav top"><li>Prev</li></ul><div class="para">
   The <code>apt-cache</code> command
   searches.
</div><div class="para">Twice,<br/>as here:</div><pre>$ ls
  a  b</pre><ul><li>one</li><li>two</li></ul><ul class="docnav"><li>Next</li></ul></body></html>"""


def test_a_page_is_its_paragraphs_and_listings_without_navigation():
    paragraphs = ["The apt-cache command searches.", "Twice,\nas here:", "$ ls\n  a  b", "one", "two"]
    assert page_text(PAGE) == "\n\n".join(paragraphs) + "\n"
