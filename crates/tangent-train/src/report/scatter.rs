//! Scatter charts: labeled points with error bars, and the front of those that no other beats.

use super::axis::Axis;
use super::frame::{Frame, Side, WIDTH, draw_notes, dropped_note};
use super::labels::place_labels;
use super::marks::circle;
use super::svg::{Area, LINE, Point, Svg, path};

/// Free pixels beside the plot, where labels may be, too.
const RIGHT: f64 = 70.0;
const RADIUS: f64 = 4.5;
/// Half the width of the ends of an error bar.
const CAP: f64 = 4.0;
const ON_FRONT: &str = "#0072b2";
const BEATEN: &str = "#d55e00";

/// Where the best points of a chart are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// Smaller x and smaller y are better, as of memory and loss.
    LowerLeft,
    /// Smaller x and larger y are better, as of memory and accuracy.
    UpperLeft,
}

/// A point of a [`ScatterChart`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScatterPoint {
    /// Stands beside the point, unless it is empty.
    pub label: String,
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Lower and upper end of the error bar, as values of the y axis.
    pub error: Option<(f64, f64)>,
}

/// Labeled points over two axes.
///
/// Points on the front are filled and joined by steps, the others are hollow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScatterChart {
    /// Stands above the chart, unless it is empty.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// Points in any order.
    pub points: Vec<ScatterPoint>,
    /// Whether and where to draw the Pareto front.
    pub front: Option<Front>,
}

impl ScatterChart {
    /// How many points and error bars have no place on the axes: values that are not finite, or not
    /// positive on a logarithmic axis. The chart says so, too.
    pub fn dropped(&self) -> usize {
        let points = self.points.iter().filter(|p| !self.shows(p)).count();
        let bars = self.points.iter().filter(|p| p.error.is_some());
        points + bars.filter(|p| self.error(p).is_none()).count()
    }

    /// The chart as an SVG element.
    pub fn svg(&self) -> String {
        let shown: Vec<&ScatterPoint> = self.points.iter().filter(|p| self.shows(p)).collect();
        let frame = self.frame(&shown);
        let values: Vec<(f64, f64)> = shown.iter().map(|p| (p.x, p.y)).collect();
        let front = self.front.map(|front| pareto_front(&values, front));
        let steps: Vec<Point> = match &front {
            Some(front) => steps(front.iter().filter_map(|i| values.get(*i)), &frame),
            None => Vec::new(),
        };
        let marks: Vec<Mark<'_>> = shown
            .iter()
            .enumerate()
            .map(|(i, &point)| Mark {
                point,
                at: frame.at((point.x, point.y)),
                error: self.error(point).map(|(low, high)| {
                    let end = |y| frame.at((point.x, y)).1;
                    (end(low), end(high))
                }),
                best: front.as_ref().is_none_or(|front| front.contains(&i)),
            })
            .collect();
        let wanted = wanted(&marks);
        let labels = place_labels(&wanted, taken(&marks, &steps), &bounds(&frame));
        let notes = self.notes(&marks, wanted.len() - labels.len());
        let height = frame.bottom() + LINE * notes.len() as f64 + 4.0;

        let mut svg = Svg::new(WIDTH, height, &self.title);
        frame.draw(&mut svg, !shown.is_empty());
        if steps.len() > 1 {
            let looks = [
                ("fill", "none"),
                ("stroke", ON_FRONT),
                ("stroke-width", "1.5"),
            ];
            svg.path(&path(steps), &looks, "");
        }
        for mark in &marks {
            mark.draw(&mut svg, &frame);
        }
        for label in &labels {
            label.draw(&mut svg);
        }
        draw_notes(&mut svg, frame.bottom(), WIDTH, &notes);
        svg.finish()
    }

    fn shows(&self, point: &ScatterPoint) -> bool {
        self.x.shows(point.x) && self.y.shows(point.y)
    }

    /// The error bar of a point, if both have a place.
    fn error(&self, point: &ScatterPoint) -> Option<(f64, f64)> {
        let has_place =
            |ends: &(f64, f64)| self.shows(point) && self.y.shows(ends.0) && self.y.shows(ends.1);
        point.error.filter(has_place)
    }

    fn frame(&self, shown: &[&ScatterPoint]) -> Frame<'_> {
        let x = Side::new(&self.x, shown.iter().map(|p| p.x));
        let ends = shown.iter().filter_map(|p| self.error(p));
        let ends = ends.flat_map(|(low, high)| [low, high]);
        let y = Side::new(&self.y, shown.iter().map(|p| p.y).chain(ends));
        Frame::new(&self.title, x, y, RIGHT)
    }

    fn notes(&self, marks: &[Mark<'_>], left_out: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if marks.iter().any(|mark| !mark.best) {
            let note =
                "Filled: no other point is at least as good in both values and better in one.";
            notes.push(note.to_string());
        }
        if left_out > 0 {
            notes.push(format!("Labels left out for lack of room: {left_out}"));
        }
        let values = || self.points.iter();
        notes.extend(self.x.beyond_note(values().map(|point| point.x)));
        notes.extend(self.y.beyond_note(values().map(|point| point.y)));
        notes.extend(dropped_note(self.dropped()));
        notes
    }
}

/// Which points no other point beats, by ascending x. Equal points do not beat each other, and
/// points that are not finite are left out.
pub fn pareto_front(points: &[(f64, f64)], front: Front) -> Vec<usize> {
    let cost = |y: f64| match front {
        Front::LowerLeft => y,
        Front::UpperLeft => -y,
    };
    let numbered = points.iter().enumerate();
    let finite = numbered.filter(|(_, (x, y))| x.is_finite() && y.is_finite());
    let mut sorted: Vec<(usize, f64, f64)> = finite.map(|(i, &(x, y))| (i, x, cost(y))).collect();
    sorted.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.2.total_cmp(&b.2)));
    let mut best: Option<(f64, f64)> = None;
    let mut indices = Vec::new();
    for (i, x, y) in sorted {
        if best.is_none_or(|best| y < best.1 || (x, y) == best) {
            best = Some((x, y));
            indices.push(i);
        }
    }
    indices
}

/// The best y up to each x: from each point of the front across, then to the next.
fn steps<'a>(front: impl Iterator<Item = &'a (f64, f64)>, frame: &Frame<'_>) -> Vec<Point> {
    let mut steps: Vec<Point> = Vec::new();
    for value in front {
        let (x, y) = frame.at(*value);
        if let Some((_, before)) = steps.last().copied() {
            steps.push((x, before));
        }
        steps.push((x, y));
    }
    steps
}

/// Where labels may be.
fn bounds(frame: &Frame<'_>) -> Area {
    Area {
        right: WIDTH,
        ..frame.area
    }
}

/// A point in the drawing.
struct Mark<'a> {
    point: &'a ScatterPoint,
    at: Point,
    /// Both ends of the error bar.
    error: Option<(f64, f64)>,
    best: bool,
}

impl Mark<'_> {
    fn draw(&self, svg: &mut Svg, frame: &Frame<'_>) {
        let color = if self.best { ON_FRONT } else { BEATEN };
        let (x, y) = self.at;
        if let Some((low, high)) = self.error {
            svg.group(&[("stroke", color), ("stroke-width", "1.5")], |svg| {
                svg.line((x, low), (x, high), &[]);
                svg.line((x - CAP, low), (x + CAP, low), &[]);
                svg.line((x - CAP, high), (x + CAP, high), &[]);
            });
        }
        let fill = if self.best { color } else { "none" };
        let looks = [
            ("fill", fill),
            ("stroke", color),
            ("stroke-width", "1.8"),
            ("pointer-events", "all"),
        ];
        let words = frame.words((self.point.x, self.point.y));
        let title = format!("{}\n{words}", self.point.label.trim());
        svg.path(&circle((x, y), RADIUS), &looks, title.trim());
    }

    fn areas(&self) -> impl Iterator<Item = Area> {
        let size = 2.0 * RADIUS + 2.0;
        let bar = self.error.map(|(low, high)| Area {
            left: self.at.0 - CAP,
            top: low.min(high),
            right: self.at.0 + CAP,
            bottom: low.max(high),
        });
        bar.into_iter().chain([Area::around(self.at, size, size)])
    }
}

/// What labels must not cover: points, error bars, and the front.
fn taken(marks: &[Mark<'_>], steps: &[Point]) -> Vec<Area> {
    let lines = steps.iter().zip(steps.iter().skip(1));
    let lines = lines.map(|(a, b)| Area {
        left: a.0.min(b.0) - 1.0,
        top: a.1.min(b.1) - 1.0,
        right: a.0.max(b.0) + 1.0,
        bottom: a.1.max(b.1) + 1.0,
    });
    marks.iter().flat_map(Mark::areas).chain(lines).collect()
}

/// Labels with their points: those of the front first, since they matter most.
fn wanted<'a>(marks: &[Mark<'a>]) -> Vec<(&'a str, Point)> {
    let (best, others): (Vec<_>, Vec<_>) = marks.iter().partition(|mark| mark.best);
    let sorted = best.into_iter().chain(others);
    let labels = sorted.map(|mark| (mark.point.label.trim(), mark.at));
    labels.filter(|(label, _)| !label.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::{Element, check};
    use super::*;

    fn point(label: &str, x: f64, y: f64) -> ScatterPoint {
        ScatterPoint {
            label: label.to_string(),
            x,
            y,
            error: None,
        }
    }

    fn chart(points: Vec<ScatterPoint>) -> ScatterChart {
        ScatterChart {
            title: "Loss against parameters".to_string(),
            x: Axis::logarithmic("Parameters", ""),
            y: Axis::linear("Loss", "nats"),
            points,
            front: Some(Front::LowerLeft),
        }
    }

    fn drawn(chart: &ScatterChart) -> Vec<Element> {
        let svg = chart.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        check(&svg).unwrap()
    }

    /// The circles, by whether they are filled.
    fn circles(elements: &[Element], filled: bool) -> Vec<&Element> {
        let circles = elements.iter().filter(|e| e.get("pointer-events") == "all");
        circles
            .filter(|e| (e.get("fill") != "none") == filled)
            .collect()
    }

    #[test]
    fn fronts_hold_what_nothing_beats() {
        let points = [
            (1.0, 5.0),
            (2.0, 3.0),
            (2.0, 4.0),
            (3.0, 3.0),
            (4.0, 1.0),
            (4.0, 1.0),
            (f64::NAN, 0.0),
            (0.5, f64::INFINITY),
        ];
        assert_eq!(pareto_front(&points, Front::LowerLeft), [0, 1, 4, 5]);
        assert_eq!(pareto_front(&points, Front::UpperLeft), [0]);
        let rising = [(3.0, 3.0), (1.0, 1.0), (2.0, 2.0)];
        assert_eq!(pareto_front(&rising, Front::UpperLeft), [1, 2, 0]);
        assert_eq!(pareto_front(&[], Front::UpperLeft), [0; 0]);
    }

    #[test]
    fn points_are_inside_and_the_front_is_filled() {
        let points = vec![
            point("small & good", 1e4, 2.0),
            point("large", 1e6, 1.0),
            point("beaten", 1e6, 3.0),
        ];
        let mut chart = chart(points);
        let elements = drawn(&chart);
        let area = chart.frame(&chart.points.iter().collect::<Vec<_>>()).area;
        let filled = circles(&elements, true);
        assert_eq!((filled.len(), circles(&elements, false).len()), (2, 1));
        for circle in filled {
            let start = circle.get("d").trim_start_matches('M');
            let mut numbers = start
                .split(' ')
                .map(|n| n.parse::<f64>().unwrap_or(f64::NAN));
            let (x, y) = (numbers.next().unwrap() + RADIUS, numbers.next().unwrap());
            assert!(x > area.left && x < area.right, "{x}");
            assert!(y > area.top && y < area.bottom, "{y}");
        }
        for label in ["small &amp; good", "large", "beaten"] {
            assert!(
                elements.iter().any(|e| e.name == "text" && e.text == label),
                "{label}"
            );
        }
        chart.front = None;
        assert_eq!(circles(&drawn(&chart), true).len(), 3);
        assert_eq!(chart.svg(), chart.svg());
    }

    #[test]
    fn the_front_is_a_staircase() {
        let chart = chart(vec![point("", 1.0, 2.0), point("", 10.0, 1.0)]);
        let frame = chart.frame(&chart.points.iter().collect::<Vec<_>>());
        let (first, second) = (frame.at((1.0, 2.0)), frame.at((10.0, 1.0)));
        let stairs = steps([(1.0, 2.0), (10.0, 1.0)].iter(), &frame);
        assert_eq!(stairs, [first, (second.0, first.1), second]);
    }

    #[test]
    fn labels_that_are_not_drawn_are_counted() {
        let crowd = (0..200).map(|i| point(&format!("method {i}"), 1e6, f64::from(i) / 1e3));
        let elements = drawn(&chart(crowd.collect()));
        let texts = elements.iter().filter(|e| e.name == "text");
        let written = texts.filter(|e| e.text.starts_with("method")).count();
        assert!((20..200).contains(&written), "{written}");
        let note = format!("Labels left out for lack of room: {}", 200 - written);
        assert!(elements.iter().any(|e| e.text == note), "{note}");
        let one = drawn(&chart(vec![point("method", 1.0, 1.0)]));
        assert!(!one.iter().any(|e| e.text.starts_with("Labels left out")));
    }

    #[test]
    fn error_bars_are_inside_the_axes() {
        let mut chart = chart(vec![point("a", 1.0, 2.0), point("b", 2.0, 2.0)]);
        chart.points[0].error = Some((1.0, 9.0));
        chart.points[1].error = Some((f64::NAN, 9.0));
        assert_eq!(chart.dropped(), 1);
        let shown: Vec<&ScatterPoint> = chart.points.iter().collect();
        let area = chart.frame(&shown).area;
        let elements = drawn(&chart);
        let bars = elements
            .iter()
            .skip_while(|e| e.get("stroke-width") != "1.5");
        let bars: Vec<&Element> = bars.skip(1).take_while(|e| e.name == "line").collect();
        assert_eq!(bars.len(), 3);
        for bar in bars {
            for y in [bar.number("y1"), bar.number("y2")] {
                assert!(y > area.top && y < area.bottom, "{bar:?}");
            }
        }
    }

    #[test]
    fn points_beyond_the_end_of_an_axis_are_at_its_end() {
        let mut chart = chart(vec![
            point("a", 1.0, 2.0),
            point("b", 2.0, 2.1),
            point("c", 3.0, 1e4),
        ]);
        chart.points[2].error = Some((2.05, 1e5));
        chart.y = chart.y.up_to(Some(2.2));
        let shown: Vec<&ScatterPoint> = chart.points.iter().collect();
        let frame = chart.frame(&shown);
        let [a, b, c] = [2.0, 2.1, 1e4].map(|y| frame.at((1.0, y)).1);
        assert!(c >= frame.area.top && c < b, "{c}");
        assert!(a - b > 0.3 * frame.area.height(), "{a} {b}");
        let told = "1 value above 2.2 is drawn at the end of the axis: Loss";
        assert!(drawn(&chart).iter().any(|e| e.text == told));
    }

    #[test]
    fn odd_data_still_make_a_chart() {
        let long = "a <very> long name ".repeat(100);
        for points in [
            vec![],
            vec![point(&long, f64::NAN, 1.0)],
            vec![point(&long, 1.0, 1.0)],
            vec![point(&long, 0.0, 1.0), point("", -1.0, f64::NEG_INFINITY)],
            vec![point(&long, 5.0, 1e300); 300],
        ] {
            for log in [false, true] {
                let mut chart = chart(points.clone());
                (chart.x.log, chart.y.log) = (log, log);
                let elements = drawn(&chart);
                let shown = circles(&elements, true).len() + circles(&elements, false).len();
                assert_eq!(shown + chart.dropped(), points.len());
                assert_eq!(elements.iter().any(|e| e.text == "no data"), shown == 0);
            }
        }
    }
}
