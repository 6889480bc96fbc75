"""The pages that are made from the committed results: tables, and docs/verdict.md."""
