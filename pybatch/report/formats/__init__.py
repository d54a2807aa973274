"""What a report is written as: text, HTML, a notebook's display, PNG figures."""
