//! The frame of charts with two axes: plot area, ticks, titles, and a note below.

use super::axis::{Axis, Scale, Tick, number};
use super::svg::{Area, FONT, LINE, Point, Svg, text_width};

/// Width of such charts in pixels.
pub const WIDTH: f64 = 800.0;
const PLOT_HEIGHT: f64 = 330.0;
/// Largest and smallest numbers of ticks asked for.
const TICKS: usize = 8;
const FEWEST_TICKS: usize = 2;

/// One axis and where its values go.
pub struct Side<'a> {
    axis: &'a Axis,
    scale: Scale,
}

impl<'a> Side<'a> {
    /// An axis for `values`; those that it cannot show are ignored.
    pub fn new(axis: &'a Axis, values: impl IntoIterator<Item = f64>) -> Self {
        let held = values.into_iter().map(|value| axis.held(value));
        let scale = Scale::covering(held, axis.log);
        Self { axis, scale }
    }

    /// Where a value is, between 0 and 1.
    fn place(&self, value: f64) -> f64 {
        self.scale.place(self.axis.held(value))
    }
}

/// Plot area, axes and titles.
pub struct Frame<'a> {
    /// Where marks go.
    pub area: Area,
    title: &'a str,
    x: Side<'a>,
    y: Side<'a>,
    rows: Vec<Tick>,
}

impl<'a> Frame<'a> {
    /// A frame with `right` free pixels beside the plot area.
    pub fn new(title: &'a str, x: Side<'a>, y: Side<'a>, right: f64) -> Self {
        let rows = y.scale.ticks(6);
        let labels = rows.iter().map(|tick| text_width(&tick.label));
        let top = if title.is_empty() { 14.0 } else { 36.0 };
        let area = Area {
            left: 34.0 + labels.fold(0.0, f64::max),
            top,
            right: WIDTH - right,
            bottom: top + PLOT_HEIGHT,
        };
        Self {
            area,
            title,
            x,
            y,
            rows,
        }
    }

    /// Where a point goes whose values the axes can show.
    pub fn at(&self, (x, y): (f64, f64)) -> Point {
        let (across, up) = (self.x.place(x), self.y.place(y));
        (
            self.area.left + across * self.area.width(),
            self.area.bottom - up * self.area.height(),
        )
    }

    /// The values of a point in words.
    pub fn words(&self, (x, y): (f64, f64)) -> String {
        let (x, y) = (number(x), number(y));
        format!("{}: {x}\n{}: {y}", self.x.axis.title, self.y.axis.title)
    }

    /// The first free pixel below ticks and title of the x axis.
    pub fn bottom(&self) -> f64 {
        self.area.bottom + 48.0
    }

    /// Draws all of it, and that there is no data if so.
    pub fn draw(&self, svg: &mut Svg, has_data: bool) {
        let area = &self.area;
        draw_title(svg, self.title, WIDTH);
        self.draw_rows(svg);
        self.draw_columns(svg);
        let line = [("stroke", "currentColor"), ("stroke-opacity", "0.6")];
        let corner = (area.left, area.bottom);
        svg.line((area.left, area.top), corner, &line);
        svg.line(corner, (area.right, area.bottom), &line);
        let (x, y) = area.center();
        let middle = ("text-anchor", "middle");
        let below = (x, area.bottom + 38.0);
        svg.text(below, &self.x.axis.caption(), area.width(), &[middle]);
        let turn = format!("rotate(-90 14 {y:.2})");
        let turned = [middle, ("transform", turn.as_str())];
        svg.text((14.0, y), &self.y.axis.caption(), area.height(), &turned);
        if !has_data {
            svg.text((x, y), "no data", area.width(), &[middle]);
        }
    }

    fn draw_rows(&self, svg: &mut Svg) {
        for tick in &self.rows {
            let y = self.area.bottom - self.y.scale.place(tick.value) * self.area.height();
            let ends = ((self.area.left, y), (self.area.right, y));
            svg.line(ends.0, ends.1, &GRID);
            let at = (self.area.left - 6.0, y + FONT / 3.0);
            svg.text(at, &tick.label, f64::INFINITY, &[("text-anchor", "end")]);
        }
    }

    fn draw_columns(&self, svg: &mut Svg) {
        for tick in fitting_ticks(&self.x.scale, self.area.width()) {
            let x = self.area.left + self.x.scale.place(tick.value) * self.area.width();
            svg.line((x, self.area.top), (x, self.area.bottom), &GRID);
            let at = (x, self.area.bottom + 17.0);
            svg.text(at, &tick.label, f64::INFINITY, &[("text-anchor", "middle")]);
        }
    }
}

const GRID: [(&str, &str); 2] = [("stroke", "currentColor"), ("stroke-opacity", "0.14")];

/// As many ticks as have room for their labels, side by side on `width` pixels.
pub fn fitting_ticks(scale: &Scale, width: f64) -> Vec<Tick> {
    let fits = |ticks: &Vec<Tick>| {
        let labels = ticks.iter().map(|tick| text_width(&tick.label) + FONT);
        labels.sum::<f64>() <= width
    };
    let mut fewer = (FEWEST_TICKS..=TICKS).rev().map(|about| scale.ticks(about));
    fewer
        .find(fits)
        .unwrap_or_else(|| scale.ticks(FEWEST_TICKS))
}

/// The title of a chart, at its upper left.
pub fn draw_title(svg: &mut Svg, title: &str, width: f64) {
    if !title.is_empty() {
        let looks = [("font-size", "15"), ("font-weight", "600")];
        // Widths are estimated for ordinary text.
        svg.text((4.0, 18.0), title, (width - 8.0) * 0.72, &looks);
    }
}

/// Lines of small text below a chart, from `top` on.
pub fn draw_notes(svg: &mut Svg, top: f64, width: f64, notes: &[String]) {
    for (i, note) in notes.iter().enumerate() {
        let at = (4.0, top + LINE * (i as f64 + 0.75));
        svg.text(at, note, width - 8.0, &[("fill-opacity", "0.8")]);
    }
}

/// What a chart says about values without a place on its axes; nothing if there are none.
pub fn dropped_note(dropped: usize) -> Option<String> {
    let values = match dropped {
        0 => return None,
        1 => "1 value is".to_string(),
        _ => format!("{dropped} values are"),
    };
    Some(format!(
        "{values} not shown: not finite, or not positive on a log scale"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::check;
    use super::*;

    #[test]
    fn points_go_where_the_axes_say() {
        let (x, y) = (Axis::logarithmic("x", ""), Axis::linear("y", "nats"));
        let sides = (Side::new(&x, [1.0, 100.0]), Side::new(&y, [-1.0, 1.0]));
        let frame = Frame::new("", sides.0, sides.1, 100.0);
        let middle = frame.at((10.0, 0.0));
        assert!(
            (middle.0 - frame.area.center().0).abs() < 1e-6,
            "{middle:?}"
        );
        assert!(
            (middle.1 - frame.area.center().1).abs() < 1e-6,
            "{middle:?}"
        );
        let (lower, upper) = (frame.at((1.0, -1.0)), frame.at((100.0, 1.0)));
        assert!(lower.0 < upper.0 && lower.1 > upper.1);
        let mut svg = Svg::new(WIDTH, frame.bottom(), "");
        frame.draw(&mut svg, true);
        let elements = check(&svg.finish()).unwrap();
        let texts: Vec<&str> = elements.iter().map(|e| e.text.as_str()).collect();
        for text in ["x, log scale", "y (nats)", "10", "100", "0.0", "-1.0"] {
            assert!(texts.contains(&text), "{text} is not in {texts:?}");
        }
        assert!(!texts.contains(&"no data"));
    }

    #[test]
    fn ticks_fit_side_by_side() {
        let scale = Scale::exact(0.0, 1.0);
        let few = fitting_ticks(&scale, 120.0).len();
        let many = fitting_ticks(&scale, 800.0).len();
        assert!((2..=4).contains(&few) && many > few, "{few} {many}");
    }

    #[test]
    fn notes_count() {
        assert_eq!(dropped_note(0), None);
        assert!(dropped_note(1).unwrap().starts_with("1 value is not shown"));
        assert!(dropped_note(7).unwrap().starts_with("7 values are not"));
    }
}
