"""What runs the notebooks: one of them, the whole study, the plan ahead of it and the pages after it."""

import sys

# jsonschema, behind nbformat, would compile a grammar of web addresses: over a second before every notebook
sys.modules.setdefault("rfc3987_syntax", None)
