"""The peers, as their documentation shows them, and the two ends of the scale. Each `app` answers `/stream?count=`."""
