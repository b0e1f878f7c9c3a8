// Before anything is drawn: the theme chosen here last time, else the system's.
const chosen = localStorage.getItem("rnn2bin-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
