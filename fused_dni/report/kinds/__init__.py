"""What results say, a module a kind: ``blocks``, and ``title`` and ``sentence`` where the one who
measures does not give them."""
