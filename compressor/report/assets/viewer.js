// Turns the report's meshes: one WebGL2 context draws every mesh, and each is copied to its own
// canvas, because browsers allow only about 16 contexts a page. Without WebGL2 the pictures stay.
// Camera, lights and the crease rule are those of compressor/render.py.
(() => {
  "use strict";
  const FIELD_OF_VIEW = 30 * Math.PI / 180;
  const START = { azimuth: 35, elevation: 25, zoom: 1 };
  const VERTEX = `#version 300 es
    in vec3 place; in vec3 normal;
    uniform vec3 low, extent, centre; uniform mat3 view; uniform vec4 lens; // focal, distance, near, far
    out vec3 seen; out vec3 smoothed;
    void main() {
      seen = view * (low + place * extent - centre);
      smoothed = view * normal;
      float depth = lens.y - seen.z;
      float a = (lens.w + lens.z) / (lens.w - lens.z), b = 2.0 * lens.w * lens.z / (lens.w - lens.z);
      gl_Position = vec4(lens.x * seen.xy, a * depth - b, depth);
    }`;
  const FRAGMENT = `#version 300 es
    precision highp float;
    in vec3 seen; in vec3 smoothed;
    uniform vec4 lens;
    out vec4 colour;
    void main() {
      vec3 eye = normalize(vec3(0.0, 0.0, lens.y) - seen);
      vec3 n = normalize(gl_FrontFacing ? smoothed : -smoothed); // open meshes show both sides
      vec3 light = vec3(0.26, 0.27, 0.30) + 0.10 * n.y;
      light += max(dot(n, normalize(vec3(-0.70, 0.75, 0.50))), 0.0) * vec3(0.78, 0.76, 0.72);
      light += max(dot(n, normalize(vec3(0.85, 0.10, 0.45))), 0.0) * vec3(0.27, 0.29, 0.33);
      float rim = 0.10 * pow(1.0 - abs(dot(n, eye)), 3.0);
      colour = vec4(light * vec3(0.80, 0.74, 0.68) + rim, 1.0);
    }`;
  const CREASE = Math.cos(40 * Math.PI / 180); // sharper edges keep their faces' own normals

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;

  function build(gl, program, data) {
    const places = new Uint16Array(bytes(data.places));
    const faces = data.wide ? new Uint32Array(bytes(data.faces)) : new Uint16Array(bytes(data.faces));
    // Corners are written out face by face, since a creased edge has two normals at one vertex.
    const flat = new Float32Array(faces.length), smooth = new Float32Array(places.length);
    const corners = new Uint16Array(3 * faces.length), normals = new Int8Array(4 * faces.length);
    const at = (vertex, k) => places[3 * vertex + k] * data.extent[k] / 65535;
    const unit = (v) => {
      const size = Math.hypot(...v);
      return size > 0 ? v.map((x) => x / size) : [0, 0, 0];
    };
    const dot = (v, w) => v[0] * w[0] + v[1] * w[1] + v[2] * w[2];
    for (let f = 0; f < faces.length; f += 3) {
      const edges = [0, 1, 2].map((k) => unit([0, 1, 2].map(
        (x) => at(faces[f + (k + 1) % 3], x) - at(faces[f + k], x))));
      const [e, g] = [edges[0], edges[2]];
      const n = unit([g[1] * e[2] - g[2] * e[1], g[2] * e[0] - g[0] * e[2], g[0] * e[1] - g[1] * e[0]]);
      flat.set(n, f);
      for (let k = 0; k < 3; k++) {
        const angle = Math.acos(Math.min(1, Math.max(-1, -dot(edges[k], edges[(k + 2) % 3]))));
        for (let x = 0; x < 3; x++) smooth[3 * faces[f + k] + x] += angle * n[x];
      }
    }
    for (let c = 0; c < faces.length; c++) {
      const own = flat.subarray(c - c % 3, c - c % 3 + 3);
      let n = unit([...smooth.subarray(3 * faces[c], 3 * faces[c] + 3)]);
      if (dot(n, own) < CREASE) n = own;
      for (let x = 0; x < 3; x++) {
        corners[3 * c + x] = places[3 * faces[c] + x];
        normals[4 * c + x] = Math.round(127 * n[x]);
      }
    }
    const state = gl.createVertexArray();
    gl.bindVertexArray(state);
    const attach = (name, array, type, stride) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
      const place = gl.getAttribLocation(program, name);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, 3, type, true, stride, 0);
    };
    attach("place", corners, gl.UNSIGNED_SHORT, 6);
    attach("normal", normals, gl.BYTE, 4);
    return { state, count: faces.length };
  }

  function compile(gl) {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) {
        throw new Error(gl.getShaderInfoLog(shader));
      }
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) {
      throw new Error(gl.getProgramInfoLog(program));
    }
    return program;
  }

  const meshes = JSON.parse(document.getElementById("meshes").textContent);
  const figures = [...document.querySelectorAll("[data-mesh]")];
  if (!figures.length) return;
  const hidden = document.createElement("canvas");
  let gl = null, program = null, built = new Map();
  const start = () => {
    gl = hidden.getContext("webgl2", { alpha: true, antialias: true });
    if (!gl) return false;
    try {
      program = compile(gl);
    } catch (error) {
      console.warn("The meshes cannot be turned here:", error);
      return false;
    }
    built = new Map();
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    return true;
  };
  if (!start()) return;
  document.documentElement.classList.add("turning");

  function draw(canvas, data, name, pose) {
    const side = Math.max(1, Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2)));
    if (canvas.width !== side || canvas.height !== side) { canvas.width = side; canvas.height = side; }
    if (hidden.width !== side || hidden.height !== side) { hidden.width = side; hidden.height = side; }
    if (!built.has(name)) built.set(name, build(gl, program, data));
    const mesh = built.get(name);
    const a = pose.azimuth * Math.PI / 180, e = pose.elevation * Math.PI / 180;
    const right = [Math.cos(a), 0, -Math.sin(a)];
    const back = [Math.cos(e) * Math.sin(a), Math.sin(e), Math.cos(e) * Math.cos(a)];
    const up = [back[1] * right[2] - back[2] * right[1], back[2] * right[0] - back[0] * right[2],
      back[0] * right[1] - back[1] * right[0]];
    const view = [0, 1, 2].flatMap((k) => [right[k], up[k], back[k]]); // columns of a mat3
    const radius = data.radius, distance = 1.03 * radius / Math.sin(FIELD_OF_VIEW / 2);
    const at = (uniform) => gl.getUniformLocation(program, uniform);
    gl.viewport(0, 0, side, side);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.uniform3fv(at("low"), data.low);
    gl.uniform3fv(at("extent"), data.extent);
    gl.uniform3fv(at("centre"), data.centre);
    gl.uniformMatrix3fv(at("view"), false, view);
    gl.uniform4f(at("lens"), pose.zoom / Math.tan(FIELD_OF_VIEW / 2), distance,
      Math.max(distance - 4 * radius, 0.02 * distance), distance + 4 * radius);
    gl.bindVertexArray(mesh.state);
    gl.drawArrays(gl.TRIANGLES, 0, mesh.count);
    const paper = canvas.getContext("2d");
    paper.clearRect(0, 0, side, side);
    paper.drawImage(hidden, 0, 0);
  }

  // All meshes of one object turn together, so that the same side can be compared.
  const rows = new Map();
  for (const figure of figures) {
    const key = figure.closest(".views") || figure;
    if (!rows.has(key)) rows.set(key, { pose: { ...START }, items: [], queued: false, near: false });
    const row = rows.get(key), name = figure.dataset.mesh, data = meshes[name];
    if (!data) continue;
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    const image = figure.querySelector("img");
    canvas.setAttribute("aria-label", (image ? image.alt : "mesh") + "; arrow keys turn it");
    row.items.push({ canvas, data, name, image });
    figure.append(canvas);
  }
  const paint = (row) => {
    if (row.queued || !row.near) return;
    row.queued = true;
    requestAnimationFrame(() => {
      row.queued = false;
      if (gl.isContextLost()) return;
      for (const item of row.items) {
        draw(item.canvas, item.data, item.name, row.pose);
        if (item.image) item.image.style.visibility = "hidden";
      }
    });
  };
  const turn = (row, dx, dy) => {
    row.pose.azimuth = (row.pose.azimuth - dx) % 360;
    row.pose.elevation = Math.min(89, Math.max(-89, row.pose.elevation + dy));
    paint(row);
  };
  for (const row of rows.values()) {
    for (const { canvas } of row.items) {
      let last = null;
      canvas.addEventListener("pointerdown", (event) => {
        last = [event.clientX, event.clientY];
        canvas.setPointerCapture(event.pointerId);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!last) return;
        const speed = 180 / Math.max(canvas.clientWidth, 1);
        turn(row, (event.clientX - last[0]) * speed, (event.clientY - last[1]) * speed);
        last = [event.clientX, event.clientY];
      });
      for (const name of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(name, () => { last = null; });
      }
      canvas.addEventListener("dblclick", () => { row.pose = { ...START }; paint(row); });
      canvas.addEventListener("wheel", (event) => {
        if (!event.ctrlKey) return; // a bare wheel scrolls the page; pinching sends ctrl
        event.preventDefault();
        row.pose.zoom = Math.min(6, Math.max(0.5, row.pose.zoom * Math.exp(-event.deltaY / 300)));
        paint(row);
      }, { passive: false });
      canvas.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, -10], ArrowDown: [0, 10] };
        if (!step[event.key]) return;
        event.preventDefault();
        turn(row, ...step[event.key]);
      });
    }
  }
  hidden.addEventListener("webglcontextlost", (event) => event.preventDefault());
  hidden.addEventListener("webglcontextrestored", () => {
    if (start()) rows.forEach((row) => paint(row));
  });
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const row = rows.get(entry.target);
      row.near = entry.isIntersecting;
      paint(row);
    }
  }, { rootMargin: "300px" });
  for (const key of rows.keys()) watch.observe(key);
  addEventListener("resize", () => rows.forEach((row) => paint(row)));
  addEventListener("beforeprint", () => rows.forEach((row) => {
    row.near = true;
    for (const item of row.items) draw(item.canvas, item.data, item.name, row.pose);
  }));
})();
