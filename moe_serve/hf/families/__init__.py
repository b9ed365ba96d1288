"""One file per supported model family, named after config.json's model_type, exporting FAMILY."""
