//! A self-contained HTML page of text, figures and tables, without scripts and network.

use std::fmt::Write;

use super::svg::escape;

/// Color of the page in light schemes and in print.
#[cfg(test)]
pub const LIGHT: &str = "#ffffff";
/// Color of the page in dark schemes.
#[cfg(test)]
pub const DARK: &str = "#15181d";

/// Charts take the color of their text and axes from `body`.
const STYLE: &str = "
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1e24; --rule: #c9cdd4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #e6e8ec; --rule: #444a54; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif; }
main { box-sizing: border-box; max-width: 1100px; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 0.6rem; }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.6rem 0; white-space: pre-line; }
figure { margin: 1.5rem 0; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 46rem; margin-top: 0.4rem; font-size: 0.9rem; opacity: 0.85; }
.table { margin: 1.2rem 0; overflow-x: auto; width: max-content;
  max-width: calc(100% + max(0px, 50vw - 560px)); }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { border-bottom-width: 2px; }
td:first-child, td.short { white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
@media print {
  :root { color-scheme: light; }
  main { max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; }
  h1, h2 { break-after: avoid; }
  .table { overflow-x: visible; width: auto; }
  td, td.short { overflow-wrap: anywhere; white-space: normal; }
}
";

/// The browser itself then refuses to load or to run anything.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// Characters of a table's cell that is not broken into lines.
const SHORT: usize = 32;

/// An HTML page under construction: text, figures and tables, one below the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// An empty page.
    pub fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            body: String::new(),
        }
    }

    /// Adds the heading of a section.
    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.element("h2", text)
    }

    /// Adds a paragraph of plain text, whose line breaks are kept.
    pub fn paragraph(&mut self, text: &str) -> &mut Self {
        self.element("p", text)
    }

    /// Adds a chart with a caption below, unless that is empty. `svg` is markup as the charts of
    /// this module write it, and is taken as it is; nothing else may be passed.
    pub fn figure(&mut self, caption: &str, svg: &str) -> &mut Self {
        self.body.push_str("<figure>\n");
        self.body.push_str(svg);
        if !caption.is_empty() {
            self.element("figcaption", caption);
        }
        self.body.push_str("</figure>\n");
        self
    }

    /// Adds a table of plain text. Columns that hold nothing but numbers, with or without a unit,
    /// are aligned to the right, and short texts stay on a line; rows may differ in length.
    pub fn table(&mut self, headers: &[impl AsRef<str>], rows: &[Vec<String>]) -> &mut Self {
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = longest.max(headers.len());
        let classes: Vec<&str> = (0..width)
            .map(|column| class(rows.iter().filter_map(|row| row.get(column))))
            .collect();
        self.body.push_str("<div class=\"table\"><table>\n");
        if !headers.is_empty() {
            let headers = headers.iter().map(AsRef::as_ref);
            self.body.push_str("<thead>\n");
            self.row("th", headers, &classes);
            self.body.push_str("</thead>\n");
        }
        self.body.push_str("<tbody>\n");
        for row in rows {
            self.row("td", row.iter().map(String::as_str), &classes);
        }
        self.body.push_str("</tbody>\n</table></div>\n");
        self
    }

    /// The whole document.
    pub fn finish(&self) -> String {
        let (title, body) = (escape(&self.title), &self.body);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\" />\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\" />\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{}\" />\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
             <body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n",
            escape(POLICY)
        )
    }

    fn element(&mut self, name: &str, text: &str) -> &mut Self {
        let text = escape(text);
        // Writing to a string cannot fail.
        let _ = writeln!(self.body, "<{name}>{text}</{name}>");
        self
    }

    /// A row as wide as the table.
    fn row<'a>(&mut self, cell: &str, texts: impl Iterator<Item = &'a str>, classes: &[&str]) {
        self.body.push_str("<tr>");
        let texts = texts.chain(std::iter::repeat(""));
        for (text, class) in texts.zip(classes) {
            let class = match class.is_empty() {
                true => String::new(),
                false => format!(" class=\"{class}\""),
            };
            let text = escape(text);
            let _ = write!(self.body, "<{cell}{class}>{text}</{cell}>");
        }
        self.body.push_str("</tr>\n");
    }
}

/// How a column of these cells looks.
fn class<'a>(cells: impl Iterator<Item = &'a String> + Clone) -> &'static str {
    if is_numeric(cells.clone()) {
        "number"
    } else if cells.into_iter().all(|cell| cell.chars().count() <= SHORT) {
        "short"
    } else {
        ""
    }
}

/// Whether a column is one of numbers: at least one, and otherwise only signs for missing ones.
fn is_numeric<'a>(cells: impl Iterator<Item = &'a String>) -> bool {
    let mut found = false;
    for cell in cells {
        match cell.trim() {
            "" | "-" | "–" | "—" | "n/a" => {}
            text if is_number(text) => found = true,
            _ => return false,
        }
    }
    found
}

/// A number, a limit of one, one and its uncertainty, or two as a range, and perhaps a short unit
/// after a space: `1,024`, `-2e-5`, `<0.001`, `12 %`, `3.1 ± 0.2`, `0.9 to 1.1`, `1.5 GiB`.
fn is_number(text: &str) -> bool {
    let digits = |part: &str| {
        let part = part.trim().trim_start_matches(['<', '>', '≤', '≥']);
        let part = part.trim_end_matches(['%', '×']);
        let part = part.replace(',', "").replace('−', "-");
        part.trim().parse::<f64>().is_ok()
    };
    let number = match text.rsplit_once(' ') {
        Some((number, unit)) if is_unit(unit) => number,
        _ => text,
    };
    let ends = number.split(" to ");
    ends.flat_map(|end| end.split('±')).all(digits)
}

fn is_unit(text: &str) -> bool {
    text.chars().count() <= 8 && text.starts_with(char::is_alphabetic) && !is_number(text)
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::{Element, check};
    use super::super::{Axis, LineChart, Series};
    use super::*;

    fn named<'a>(elements: &'a [Element], name: &str) -> Vec<&'a Element> {
        elements.iter().filter(|e| e.name == name).collect()
    }

    #[test]
    fn a_page_is_well_formed_and_loads_nothing() {
        let chart = LineChart {
            title: "Loss".to_string(),
            x: Axis::linear("Step", ""),
            y: Axis::linear("Loss", "nats"),
            series: vec![Series {
                name: "lora".to_string(),
                points: vec![(0.0, 2.0), (1.0, 1.0)],
                band: Vec::new(),
            }],
        };
        let mut page = Page::new("A <b> & \"c\"");
        page.paragraph("1 < 2 & <script>alert('x')</script>");
        page.heading("Section & more");
        page.figure("Caption <i>", &chart.svg());
        page.figure("", &chart.svg());
        page.table(&["a<", "b"], &[vec!["1 & 2".to_string(), "3".to_string()]]);
        let html = page.finish();
        assert!(html.starts_with("<!DOCTYPE html>\n"));
        let elements = check(&html).unwrap();
        assert_eq!(
            named(&elements, "h1")[0].text,
            "A &lt;b&gt; &amp; &quot;c&quot;"
        );
        assert_eq!(named(&elements, "h2")[0].text, "Section &amp; more");
        assert_eq!(
            (
                named(&elements, "svg").len(),
                named(&elements, "figcaption").len()
            ),
            (2, 1)
        );
        assert!(named(&elements, "p")[0].text.contains("&lt;script&gt;"));
        for name in ["script", "link", "img", "iframe", "b"] {
            assert!(named(&elements, name).is_empty(), "{name}");
        }
        let addresses = html.matches("://").count();
        assert_eq!(
            addresses,
            html.matches("http://www.w3.org/2000/svg").count()
        );
        for attribute in ["href", "src", "url("] {
            assert!(!html.replace("-src", "").contains(attribute), "{attribute}");
        }
        assert_eq!(html, page.finish());
    }

    #[test]
    fn columns_are_of_numbers_or_short_or_broken_into_lines() {
        let row = |cells: [&str; 3]| cells.map(str::to_string).to_vec();
        let mut page = Page::new("t");
        let rows = [
            row(["lora", "1,024", "3.1 ± 0.2"]),
            row(["2", "–", "1.5 GiB"]),
            vec!["dora".to_string()],
            ["", "", "", &"word ".repeat(9)]
                .map(str::to_string)
                .to_vec(),
        ];
        page.table(&["method", "rank", "memory", "more"], &rows);
        let elements = check(&page.finish()).unwrap();
        let classes = |name: &str| -> Vec<&str> {
            let cells = elements.iter().filter(|e| e.name == name);
            cells.map(|e| e.get("class")).collect()
        };
        let want = ["short", "number", "number", ""];
        assert_eq!(classes("th"), want);
        assert_eq!(classes("td"), want.repeat(4));
    }

    #[test]
    fn numbers_are_told_from_text() {
        for number in [
            "0",
            "-1.5",
            "2e-5",
            "12 %",
            "12%",
            "1,024",
            "3 ± 1",
            "−2",
            "1.2×",
            "5 ms",
            "<0.001",
            "0.9 to 1.1",
            "-3 to 12 %",
        ] {
            assert!(is_number(number), "{number}");
        }
        for text in [
            "lora",
            "q_proj",
            "7 of 9",
            "1.2.3",
            "± lora",
            "step 5",
            "%",
            "8 a 9",
            "<",
            "to",
            "1 to many",
        ] {
            assert!(!is_number(text), "{text}");
        }
    }

    #[test]
    fn empty_pages_and_tables_are_well_formed() {
        let mut page = Page::new("");
        check(&page.finish()).unwrap();
        page.table(&[] as &[&str], &[]);
        page.table(&["only headers"], &[]);
        page.table(&[] as &[&str], &[vec!["no headers".to_string()]]);
        let elements = check(&page.finish()).unwrap();
        assert_eq!(named(&elements, "table").len(), 3);
        assert_eq!(
            (named(&elements, "th").len(), named(&elements, "td").len()),
            (1, 1)
        );
    }

    #[test]
    fn the_style_has_the_papers_that_colors_are_tested_on() {
        for paper in [LIGHT, DARK] {
            assert!(STYLE.contains(&format!("--paper: {paper};")), "{paper}");
        }
        assert!(!STYLE.contains(['<', '&']));
    }
}
