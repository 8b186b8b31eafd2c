"""`sdd demo`: a page in the browser on which a subject is cut out, placed and drawn."""
