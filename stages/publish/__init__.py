"""publish: the adapter, its model card and pictures, to a Hub model repository or to a folder in the same layout."""
