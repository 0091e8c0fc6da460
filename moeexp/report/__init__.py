"""Records in, tables and pages out."""
