"""What people read: figures of merit, tables, plots, the HTML report."""
