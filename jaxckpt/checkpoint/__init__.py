"""One checkpoint: save it, commit it, restore it, look into it; and read those of other libraries."""
