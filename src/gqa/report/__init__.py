"""The report page: a study's record in, one offline HTML file out. No figure is computed here that the record holds."""
