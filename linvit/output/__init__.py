"""What commands write and show: files that are never half written, tables, plots."""
