//! A small SVG writer: shapes, groups, and text whose width is estimated without a font.

use std::borrow::Cow;

/// Size of ordinary text in pixels.
pub const FONT: f64 = 12.0;
/// Height of a line of text in pixels.
pub const LINE: f64 = 18.0;

/// Names and unescaped values of attributes.
pub type Attributes<'a> = &'a [(&'a str, &'a str)];

/// A place in the drawing, in pixels from the upper left corner.
pub type Point = (f64, f64);

/// A rectangle of the drawing in pixels; y grows downward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Area {
    /// Smallest x.
    pub left: f64,
    /// Smallest y.
    pub top: f64,
    /// Largest x.
    pub right: f64,
    /// Largest y.
    pub bottom: f64,
}

impl Area {
    /// The rectangle that reaches `width / 2` and `height / 2` to each side of a point.
    pub fn around((x, y): Point, width: f64, height: f64) -> Self {
        Self {
            left: x - width / 2.0,
            top: y - height / 2.0,
            right: x + width / 2.0,
            bottom: y + height / 2.0,
        }
    }

    /// Pixels from left to right.
    pub fn width(&self) -> f64 {
        self.right - self.left
    }

    /// Pixels from top to bottom.
    pub fn height(&self) -> f64 {
        self.bottom - self.top
    }

    /// The middle.
    pub fn center(&self) -> Point {
        (
            f64::midpoint(self.left, self.right),
            f64::midpoint(self.top, self.bottom),
        )
    }

    /// Whether the two share more than an edge.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }

    /// Whether `other` is inside.
    pub fn holds(&self, other: &Self) -> bool {
        self.left <= other.left
            && other.right <= self.right
            && self.top <= other.top
            && other.bottom <= self.bottom
    }
}

/// A drawing under construction. It needs no identifiers, so many may stand in one page.
pub struct Svg {
    width: f64,
    height: f64,
    name: String,
    body: String,
}

impl Svg {
    /// An empty drawing, in pixels; `name` is what screen readers say.
    pub fn new(width: f64, height: f64, name: &str) -> Self {
        Self {
            width,
            height,
            name: escape(name),
            body: String::new(),
        }
    }

    /// The whole element. Text has the color of the page around it.
    pub fn finish(self) -> String {
        let (width, height) = (coordinate(self.width), coordinate(self.height));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"{}\" \
             fill=\"currentColor\" font-family=\"system-ui, sans-serif\" \
             font-size=\"{FONT}\">\n{}</svg>\n",
            self.name, self.body
        )
    }

    /// What `draw` draws, with common attributes.
    pub fn group(&mut self, attributes: Attributes<'_>, draw: impl FnOnce(&mut Self)) {
        self.open("g", &[], attributes);
        self.body.push_str(">\n");
        draw(self);
        self.body.push_str("</g>\n");
    }

    /// A straight line.
    pub fn line(&mut self, from: Point, to: Point, attributes: Attributes<'_>) {
        let ends = [("x1", from.0), ("y1", from.1), ("x2", to.0), ("y2", to.1)];
        self.open("line", &ends, attributes);
        self.close("line", "");
    }

    /// A rectangle; `title` is shown while the pointer is over it, unless it is empty.
    pub fn rect(&mut self, area: &Area, attributes: Attributes<'_>, title: &str) {
        let numbers = [
            ("x", area.left),
            ("y", area.top),
            ("width", area.width()),
            ("height", area.height()),
        ];
        self.open("rect", &numbers, attributes);
        self.close("rect", title);
    }

    /// An outline, as [`path`] writes it; `title` is shown while the pointer is over it, unless
    /// it is empty.
    pub fn path(&mut self, data: &str, attributes: Attributes<'_>, title: &str) {
        self.open("path", &[], &[("d", data)]);
        self.attributes(attributes);
        self.close("path", title);
    }

    /// A line of text at its base line. What is wider than `room` pixels loses its middle, and is
    /// shown whole while the pointer is over it.
    pub fn text(&mut self, at: Point, content: &str, room: f64, attributes: Attributes<'_>) {
        self.open("text", &[("x", at.0), ("y", at.1)], attributes);
        self.body.push('>');
        let shown = shorten(content, room);
        if shown != content {
            self.title(content);
        }
        self.body.push_str(&escape(&shown));
        self.body.push_str("</text>\n");
    }

    fn open(&mut self, name: &str, numbers: &[(&str, f64)], attributes: Attributes<'_>) {
        self.body.push('<');
        self.body.push_str(name);
        for (key, value) in numbers {
            self.attributes(&[(*key, coordinate(*value).as_str())]);
        }
        self.attributes(attributes);
    }

    fn attributes(&mut self, attributes: Attributes<'_>) {
        for (key, value) in attributes {
            self.body.push_str(&format!(" {key}=\"{}\"", escape(value)));
        }
    }

    fn close(&mut self, name: &str, title: &str) {
        if title.is_empty() {
            self.body.push_str("/>\n");
        } else {
            self.body.push('>');
            self.title(title);
            self.body.push_str(&format!("</{name}>\n"));
        }
    }

    fn title(&mut self, title: &str) {
        let title = format!("<title>{}</title>", escape(title));
        self.body.push_str(&title);
    }
}

/// Path data of straight lines through `points`; empty without any.
pub fn path(points: impl IntoIterator<Item = Point>) -> String {
    let mut data = String::new();
    for (x, y) in points {
        let step = if data.is_empty() { "M" } else { " L" };
        data.push_str(&format!("{step}{} {}", coordinate(x), coordinate(y)));
    }
    data
}

/// A number of pixels with two decimals, the same everywhere; 0 for what is not finite.
pub fn coordinate(pixels: f64) -> String {
    let visible = pixels.is_finite() && pixels.abs() >= 0.005;
    format!("{:.2}", if visible { pixels } else { 0.0 })
}

/// Text for element content and attribute values. Characters that XML forbids become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\t' | '\n' | '\r' => escaped.push(c),
            _ if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            _ => escaped.push(c),
        }
    }
    escaped
}

/// About how wide a line of ordinary text is, in pixels.
pub fn text_width(text: &str) -> f64 {
    text.chars().map(char_width).sum()
}

/// Widths of common sans-serif fonts, rounded up.
fn char_width(c: char) -> f64 {
    let em = match c {
        'f' | 'i' | 'j' | 'l' | 'r' | 't' | 'I' => 0.38,
        ' ' | '.' | ',' | ':' | ';' | '\'' | '|' | '(' | ')' => 0.38,
        'm' | 'w' | 'M' | 'W' | '@' | '%' | '…' => 1.0,
        'A'..='Z' => 0.72,
        '\0'..='\u{2e7f}' => 0.6,
        _ => 1.1,
    };
    em * FONT
}

/// `text` if it fits into `room` pixels, else its beginning and its end: names of runs often
/// differ at their ends alone.
pub fn shorten(text: &str, room: f64) -> Cow<'_, str> {
    if text_width(text) <= room {
        return Cow::Borrowed(text);
    }
    let half = (room - char_width('…')) / 2.0;
    let head = fitting(text.chars(), half);
    let tail = fitting(text.chars().rev(), half);
    let tail: String = tail.chars().rev().collect();
    Cow::Owned(format!("{head}…{tail}"))
}

/// As many of the first characters as fit.
fn fitting(chars: impl Iterator<Item = char>, room: f64) -> String {
    let mut left = room;
    let fits = |c: &char| {
        left -= char_width(*c);
        left >= 0.0
    };
    chars.take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::check;
    use super::*;

    #[test]
    fn text_is_escaped_and_groups_are_closed() {
        let mut svg = Svg::new(10.0, 20.0, "a \"b\" & <c>");
        svg.group(&[("fill", "none")], |svg| {
            svg.line((0.0, f64::NAN), (1.0, -0.001), &[]);
            svg.path(&path([(0.0, 1.0), (2.5, 3.0)]), &[], "it's <here>");
        });
        svg.text((1.0, 2.0), "x < y\u{1b}", f64::INFINITY, &[]);
        let elements = check(&svg.finish()).unwrap();
        let names: Vec<&str> = elements.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["svg", "g", "line", "path", "title", "text"]);
        assert_eq!(
            elements[0].get("aria-label"),
            "a &quot;b&quot; &amp; &lt;c&gt;"
        );
        assert_eq!(elements[0].get("viewBox"), "0 0 10.00 20.00");
        assert_eq!(
            (elements[2].get("y1"), elements[2].get("y2")),
            ("0.00", "0.00")
        );
        assert_eq!(elements[3].get("d"), "M0.00 1.00 L2.50 3.00");
        assert_eq!(elements[4].text, "it&#39;s &lt;here&gt;");
        assert_eq!(elements[5].text, "x &lt; y\u{fffd}");
    }

    #[test]
    fn long_text_keeps_its_ends() {
        let long = format!("first{}last", "-".repeat(500));
        let short = shorten(&long, 100.0);
        assert!(
            short.starts_with("first") && short.ends_with("last"),
            "{short}"
        );
        assert!(text_width(&short) <= 100.0, "{short}");
        assert_eq!(shorten("short", 100.0), "short");
        assert_eq!(shorten("no room", 0.0), "…");
        let mut svg = Svg::new(1.0, 1.0, "");
        svg.text((0.0, 0.0), &long, 100.0, &[]);
        let elements = check(&svg.finish()).unwrap();
        assert_eq!(
            (elements[2].name.as_str(), &elements[2].text),
            ("title", &long)
        );
    }

    #[test]
    fn areas_that_touch_do_not_overlap() {
        let area = Area::around((5.0, 5.0), 10.0, 4.0);
        assert_eq!(
            (area.left, area.top, area.right, area.bottom),
            (0.0, 3.0, 10.0, 7.0)
        );
        assert!(area.overlaps(&Area::around((10.0, 5.0), 2.0, 2.0)));
        assert!(!area.overlaps(&Area::around((11.0, 5.0), 2.0, 2.0)));
        assert!(area.holds(&Area::around(area.center(), 10.0, 4.0)));
        assert!(!area.holds(&Area::around((9.5, 5.0), 2.0, 2.0)));
    }
}
