// Search without a server: the index is a script that is loaded when somebody begins to type.
(() => {
  const up = document.body.dataset.up, input = document.querySelector('.find input'), list = document.querySelector('.find ol')
  if (matchMedia('(max-width:1100px)').matches) document.querySelectorAll('.toc details').forEach(d => d.open = false)
  let on = -1
  const load = () => window.DOCS ? Promise.resolve() : new Promise(done => {
    const s = document.createElement('script'); s.src = up + 'search.js'; s.onload = done; document.head.append(s)
  })
  const rank = (row, words) => {
    const name = row[0].toLowerCase(), path = row[1].toLowerCase(), text = row[3]
    let score = 0
    for (const w of words) {
      const one = name === w ? 100 : name.startsWith(w) ? 40 : name.includes(w) ? 20 : path.includes(w) ? 10
        : (' ' + text + ' ').includes(' ' + w + ' ') ? 4 : (' ' + text).includes(' ' + w) ? 2 : 0
      if (!one) return 0
      score += one
    }
    return score + (['Tutorials', 'Guides', 'Experiments'].includes(row[2]) ? 3 : row[2] === 'Text' ? 2 : 0)
  }
  const show = async () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean)
    if (!words.length) { list.hidden = true; return }
    await load()
    const hits = window.DOCS.map(r => [rank(r, words), r]).filter(h => h[0]).sort((a, b) => b[0] - a[0]).slice(0, 30)
    list.replaceChildren(...hits.map(([, r]) => {
      const li = document.createElement('li'), a = document.createElement('a'), s = document.createElement('span')
      a.href = up + r[1]; a.textContent = r[0]; s.textContent = r[2] + ' · ' + r[1].replace(/\.html.*/, ''); a.append(s); li.append(a)
      return li
    }))
    if (!hits.length) { const li = document.createElement('li'); li.textContent = 'Nothing found.'; list.append(li) }
    list.hidden = false; on = -1
  }
  input.addEventListener('input', show)
  input.addEventListener('focus', load)
  input.addEventListener('keydown', e => {
    const all = [...list.querySelectorAll('a')]
    if (e.key === 'Escape') list.hidden = true
    else if (e.key === 'Enter' && all.length) all[Math.max(on, 0)].click()
    else if (['ArrowDown', 'ArrowUp'].includes(e.key) && all.length) {
      on = (on + (e.key === 'ArrowDown' ? 1 : -1) + all.length) % all.length
      all.forEach((a, k) => a.parentNode.classList.toggle('on', k === on)); all[on].scrollIntoView({block: 'nearest'}); e.preventDefault()
    }
  })
  document.addEventListener('keydown', e => { if (e.key === '/' && document.activeElement !== input) { e.preventDefault(); input.focus() } })
  document.addEventListener('click', e => { if (!e.target.closest('.find')) list.hidden = true })
})()
